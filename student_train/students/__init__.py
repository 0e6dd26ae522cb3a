"""Students: composed, cut, prepared, exported."""
