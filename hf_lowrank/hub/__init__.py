"""Model cards, and pushing a model to the Hub in one commit."""
