"""Report of a run or of benchmark results: an HTML page and a Markdown summary."""
