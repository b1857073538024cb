"""One page that shows a run: what was done, what went wrong, and how good the result is.

``facts.py`` gathers what the run's files say, ``results.py`` what was measured on its model,
``verdict.py`` judges it in words, ``plots.py`` draws it,
``sections.py`` and ``beyond.py`` put figures and tables together, and ``page.py`` writes the HTML.
"""
