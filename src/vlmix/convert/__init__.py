"""Published checkpoint folders <-> vlmix model folders, with every tensor accounted for."""
