"""A merged model whose blocks lie in processes of a cluster, such as one on each GPU.

Batches walk down the chain beside each other (`walks`), so that while one of them is at a block the next one
is at the block before it. Processes are shared out by what each block has to compute (`placement`); a process
that dies is replaced, and what it was asked is asked again (`places`). What runs in a process is in `stage`.
"""
