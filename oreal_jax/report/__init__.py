"""Reports on runs: a self-contained HTML page, and the same in the terminal."""
