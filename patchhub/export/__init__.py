"""States in the forms that other programs read: PEFT adapters and files of deltas."""
