"""What is done with a merged model: check it, draw from it, measure it, export it."""
