"""How a concept lies in the hidden states of each layer: ``dbtrain sweep``.

``concepts.py`` says what is asked, ``hidden.py`` and ``foreign.py`` read the states of a merged run and of a
Hugging Face folder, ``geometry.py`` measures, ``phases.py`` looks for steps, ``sweep.py`` puts them together.
"""
