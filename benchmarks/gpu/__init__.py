"""One prepared run on a machine with a GPU; its scripts need nothing installed."""
