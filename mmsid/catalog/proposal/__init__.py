"""Proposal of a configuration for a catalogue that nobody has described yet: `mmsid init`."""

from mmsid.catalog.proposal.config_text import config_text, proposal_table
from mmsid.catalog.proposal.propose import Proposal, propose

__all__ = ["Proposal", "config_text", "proposal_table", "propose"]
