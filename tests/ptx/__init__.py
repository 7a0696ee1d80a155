"""Compiled kernels without a GPU: an interpreter of PTX, the code that Triton hands to ptxas.

``tests`` run the library on CPU tensors; each launch is compiled for an absent GPU, as the JIT
would compile it there, and its PTX is executed for all threads of several programs at once:

    with interpreted("sm_90"):
        tritonloss.sigmoid_focal_loss(x, labels).backward()

Anything unknown raises: an opcode, a modifier, a type, a number of operands, a directive. The
checks raise ``Fault`` for accesses beyond a tensor's elements, misaligned ones, bytes never written
(memory of ``torch.empty``, registers and shared memory start as garbage), programs that meet in
memory without atomics, warps that meet in shared memory without a barrier, and warp instructions in
a diverged warp. Programs run in random order.

What it does not prove: what ptxas makes of the PTX, and the hardware; weak memory ordering (a
program sees what others stored at once); the true error of approximate instructions (``noise``
moves them by up to the documented one) and which products ptxas fuses (``contract`` fuses all that
it may); threads of one program that meet in global memory without a barrier; a stray access that
happens to hit another tensor of the launch; launches that Inductor generates; speed.
"""
