"""From image files and archives to DataLoaders."""
