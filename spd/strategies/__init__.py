"""What is done to dropped blocks so that they bear it: one file each, and `recovery`, which does it block by block.

zs                nothing: dropped blocks are SPD blocks with the original weights (zero-shot)
b2b               block-to-block distillation
head_grouping     other heads beside each other on a rank
correction        what a rank lacks, predicted from what it has (beyond the paper)
"""
