"""Every method of the registry on the same tasks."""
