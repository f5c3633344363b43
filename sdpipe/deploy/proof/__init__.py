"""Every file of a run against its own reference, over the whole test part; and how good it is."""
