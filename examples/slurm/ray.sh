#!/bin/bash
# A Ray cluster on the nodes of a SLURM job, and on it one big training (the default) or a sweep:
#   sbatch examples/slurm/ray.sh
#   sbatch examples/slurm/ray.sh python -m pipeline.sweep --config configs/sweep.yaml --ray {address}
# Submit it from the checkout, which all nodes see under the same path, .venv included (`make setup`).
# {address} stands for the cluster's. A job that was cut off goes on where it was: submit it again.
#SBATCH --job-name=carracing
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@60
#SBATCH --output=slurm-%j.out
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
export PATH="$PWD/.venv/bin:$PATH"
[ $# -gt 0 ] || set -- python -m pipeline.train --ray "{address}"

# Who reaches a Ray port runs code as you. The token is in a file that only you can read, never on a command line.
umask 077
mkdir -p runs
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$PWD/runs/ray-$SLURM_JOB_ID.token"
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
export RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0
umask 022

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 20000))
address="$ip:$port"

work=
finish() {
    [ -z "$work" ] || { kill -TERM "$work" 2> /dev/null || true; wait "$work" || true; } # it saves its state
    scancel --signal=TERM --full "$SLURM_JOB_ID" 2> /dev/null || true # the steps: Ray on the nodes
    rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap finish EXIT
trap 'exit 143' TERM

# The learner has the first node's cores but four; what is left steps environments like the other nodes.
srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" \
    ray start --head --node-ip-address="$ip" --port="$port" --num-cpus=$((SLURM_CPUS_PER_TASK - 4)) \
    --include-dashboard=false --disable-usage-stats --block &
for _ in $(seq 120); do
    (exec 3<> "/dev/tcp/$ip/$port") 2> /dev/null && break
    sleep 1
done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --overlap --exclude="$head" \
        ray start --address="$address" --num-cpus="$SLURM_CPUS_PER_TASK" --disable-usage-stats --block &
fi
python - "$address" "$SLURM_JOB_NUM_NODES" << 'PYTHON'
import sys
import time

import ray

ray.init(address=sys.argv[1], log_to_driver=False)
until = time.monotonic() + 300
while (nodes := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[2]) and time.monotonic() < until:
    time.sleep(2)
print(f"{nodes} of {sys.argv[2]} nodes, {ray.cluster_resources().get('CPU', 0):.0f} CPUs")
PYTHON

"${@//\{address\}/$address}" &
work=$!
wait "$work"
