"""A merged model as a folder that loads without this package."""
