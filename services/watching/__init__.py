"""What a run looks at beside its measures: shortcuts, collapse, copying, cycles; and the alarms."""
