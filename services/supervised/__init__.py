"""The baseline `sft`: its loop and its processes."""
