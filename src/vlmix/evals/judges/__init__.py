"""Models that mark answers: behind a server, or recorded on a cassette."""
