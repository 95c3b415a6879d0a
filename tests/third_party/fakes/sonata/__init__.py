"""The interfaces of facebookresearch/sonata that its exporter uses, with two small stages."""
