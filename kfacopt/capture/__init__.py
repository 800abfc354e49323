"""What a forward and a backward of the user's show of the layers: the only hooks are here."""
