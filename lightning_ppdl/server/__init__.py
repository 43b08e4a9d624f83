"""The parameter server: merges what participants release. It never sees data, nor Lightning."""
