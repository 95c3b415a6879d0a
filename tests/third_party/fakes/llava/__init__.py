"""The interfaces of ZCMax/LLaVA-3D that its exporter uses, around a tiny Llama of transformers."""
