"""`stepcache report`: a benchmark's results as one page, and its charts as files."""
