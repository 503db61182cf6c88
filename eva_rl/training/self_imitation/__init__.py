"""Self-imitation: clone solved episodes, retry the starts that failed."""
