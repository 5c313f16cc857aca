"""`text_quality`: how specific, grounded and useful the mined interests of an item are, learned from a judge or from known truth."""
