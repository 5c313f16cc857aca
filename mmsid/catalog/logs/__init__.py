"""User logs of any form, read into histories."""
