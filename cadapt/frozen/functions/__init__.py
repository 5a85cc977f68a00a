"""Operations that give the outputs and gradients of torch's own and keep less for backward.

Each file holds one idea: its algebra, the `torch.autograd.Function` that carries it out, and a plain function in front.
They know tensors only; the passes of `cadapt.frozen` put them into a graph.
"""
