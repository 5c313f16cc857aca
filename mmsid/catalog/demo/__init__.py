"""The drawn demo catalogue: ads made with Pillow whose facts, users and best achievable ranking are known."""
