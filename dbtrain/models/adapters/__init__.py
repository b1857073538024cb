"""Networks of other libraries, cut into stem, layers and head: a file for each class, and what all share."""
