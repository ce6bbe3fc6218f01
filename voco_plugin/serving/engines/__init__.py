"""What runs stage 2 for many requests at once, behind one interface (:mod:`.request`)."""
