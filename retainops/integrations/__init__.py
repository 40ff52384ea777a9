"""Other libraries: where answers can go, and whose models can be asked. Each module here imports its one itself."""
