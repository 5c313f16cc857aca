"""Stage `text_quality`: quality of mined descriptors, learned from a judge's labels or from the known facts of the demo catalogue."""
