"""How agents decide and what is kept of it: requests, protocol, parsing, the loop, the journal, decisions."""
