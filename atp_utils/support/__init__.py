"""What every other package stands on: files, folders, manifests, progress, kinds of values."""
