"""A built dataset looked at: whole, described, compared, shown."""
