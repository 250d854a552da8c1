"""The nouns and plumbing every other package stands on; imports nothing else of ours."""
