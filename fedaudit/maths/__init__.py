"""Pure functions that layers share which never import each other."""
