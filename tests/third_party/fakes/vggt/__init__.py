"""The interfaces of facebookresearch/vggt that its exporter uses, around a known geometry."""
