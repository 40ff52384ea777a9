"""Where answers can go: each module here speaks to one other library, and imports it only itself."""
