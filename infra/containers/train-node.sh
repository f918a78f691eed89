#!/bin/sh
# One node of a training on several machines: the node 0 runs the stage through DVC, the others join it.
#
# Environment: JOB_COMPLETION_INDEX (number of this node), NODES, GPUS (of each node), MAIN_ADDRESS (of node 0). The
# folder is the project, on one file system that all nodes share, with everything before `train` up to date.
set -eu

config=$(mktemp)
sed -e "s/^num_processes:.*/num_processes: $((NODES * GPUS))/" \
    -e "s/^num_machines:.*/num_machines: $NODES/" \
    -e "s/^machine_rank:.*/machine_rank: $JOB_COMPLETION_INDEX/" \
    -e "s/^main_process_ip:.*/main_process_ip: $MAIN_ADDRESS/" \
    infra/accelerate/multi_node.yaml > "$config"

if [ "$JOB_COMPLETION_INDEX" -eq 0 ]; then
    AFTERIMAGE_ACCELERATE=$config exec python -m dvc repro --single-item train
fi
arguments=$(python -c "import yaml; print(yaml.safe_load(open('dvc.yaml'))['stages']['train']['cmd'].split(' ', 2)[2])")
# The arguments are a module and paths without spaces.
# shellcheck disable=SC2086
exec accelerate launch --config_file "$config" -m $arguments
