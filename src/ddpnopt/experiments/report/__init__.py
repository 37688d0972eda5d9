"""Tables, plots and self-contained HTML pages of results."""
