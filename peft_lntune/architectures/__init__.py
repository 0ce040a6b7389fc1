"""The one place that names other people's modules: blocks, roles, sub-layers, components, attention."""
