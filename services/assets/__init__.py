"""Example models and data: what there is and where it comes from."""
