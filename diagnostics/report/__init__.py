"""Tables in, pages out: figures, summaries in sentences, token views and report.html."""
