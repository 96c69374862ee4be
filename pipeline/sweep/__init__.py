"""Many trainings as one piece of work: a setting on several seeds, or a search for a better one.

==============  =====================================================================================
``__main__``    the command
``definition``  what a sweep is: a file and its mistakes
``space``       the parameters that are searched, and what they may be
``job``         one training, as a process of its own
``launch``      starts that process
``runner``      keeps as many jobs running as there is room for, through crashes and lost machines
``on_ray``      the same on the machines of a Ray cluster
``study``       Optuna: what to try next, and what to give up
``search``      trials: asked for, trained, told
``confirm``     the winner on fresh seeds
``report``      what came out, for MLflow and for people
``winner``      the best setting as a file and as a DVC experiment
==============  =====================================================================================
"""
