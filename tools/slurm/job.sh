# What the batch scripts of this folder have in common; they source it, and `run=(...)`, what the user has edited, is set.
# docs/slurm.md tells what it does at which end of a job; `end` decides it.
#
#   on_all_ranks COMMAND...  one task per device by srun; rank 0's lines and everybody's errors to the job's log
#   alone COMMAND...         one process beside this script, which starts tasks itself
#
# Either ends the job: with the program's exit code, or by giving it back to SLURM's queue, to go on later.

set +e
tries=3 # starts that do not get on, after which a job is not requeued
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # one task of an array has the number of them all
job=${job:-$SLURM_JOB_ID}
logs=logs/$job # of each rank; and
ended=$logs/ended-${SLURM_RESTART_COUNT:-0} # exit code of the first rank that failed, and whether it was asked to stop
stuck=$logs/stuck # where starts have begun that have not got on
export VITRUVIUS_CHECKPOINTS=$PWD/$logs/checkpoints # the engine appends each that it has saved, or goes on from
program= # number of the process that is waited for
passed=  # whether it has SLURM's warning
start="the start" # of the run, where nothing is saved yet
final="0 2 4" # exit codes after which another try would end alike: done, wrong, diverged
stop= # whether this script has been asked for a stop
export PYTHONUNBUFFERED=1
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # SLURM from 22.05 does not

say() { echo "$(date '+[%H:%M:%S]') job: $*"; }

give_up() {
  say "$2"
  exit "$1"
}

# What one rank does: the program, with its lines kept in a file of its own. Signals of SLURM go to all processes of a
# task: only the program heeds them. The first rank that fails says how. srun's code is the highest of all tasks': where
# signals were asked for, that of a task that was killed, and could say nothing, must be seen in it.
rank='
log=$1/rank-$SLURM_PROCID.log ended=$2 asked=
shift 2
trap asked=asked TERM USR1 INT
keep() { trap "" TERM USR1 INT; exec tee -a "$log"; }
if [ "$SLURM_PROCID" = 0 ]; then "$@" 2>&1 | keep; else "$@" 2>&1 >> "$log" | keep; fi
code=${PIPESTATUS[0]}
[ "$code" = 0 ] || (set -C; echo "$code $asked" > "$ended") 2> /dev/null
[ "$asked" = "" ] || [ "$code" -le 128 ] || exit 3
exit "$code"'

on_all_ranks() {
  begin "$@"
  srun --kill-on-bad-exit=1 "${container[@]}" bash -c "$rank" rank "$logs" "$ended" "$@" &
  finish
}

alone() {
  final+=" 1" # of its results
  begin "$@"
  "$@" &
  finish
}

begin() { # make the job's folder, note where the program goes on from, and look at the nodes
  run=("$@")
  trap pass_on USR1
  trap : TERM # the tasks have it from SLURM, too
  # A folder that is there before the first start is another cluster's job's, or of numbers that have begun anew.
  [ "${SLURM_RESTART_COUNT:-0}" != 0 ] || [ ! -e "$logs" ] || mv "$logs" "$logs-until-$(date +%Y%m%d-%H%M%S)"
  mkdir -p "$logs" && rm -f "$ended" || give_up 2 "cannot write to $logs"
  say "start ${SLURM_RESTART_COUNT:-0} of job $job on $SLURM_JOB_NODELIST, $SLURM_NTASKS task(s)," \
    "${SLURM_CPUS_ON_NODE:-?} CPU(s) on the first node, logs of ranks in $logs"
  from=$(progress)
  [ -z "${container[*]}" ] || srun "${container[@]}" --version > /dev/null || give_up 2 "srun refuses ${container[*]}"
  look "$@"
  local code=$?
  case $code in
    0) [ -z "$stop" ] || end 138 ;; # as the program's would be, had the warning come when it had just begun
    10) give_up 2 "a node is not fit for this job" ;;
    2 | 11 | 126 | 127) give_up "$code" "nodes cannot be looked at: not requeued" ;;
    130 | 138 | 143) end "$code" asked ;;
    *) end "$code" ;;
  esac
}

look() { # at each node, by one task that sees all of its GPUs, and keeps nothing from the program's tasks
  local of_tasks=(SLURM_GPUS_PER_TASK SLURM_NTASKS_PER_GPU SLURM_GPU_BIND SLURM_TRES_PER_TASK SLURM_TRES_BIND)
  env "${of_tasks[@]/#/--unset=}" SLURM_OVERLAP=1 \
    srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 "${container[@]}" \
    env "JOB_TASKS_PER_NODE=$SLURM_TASKS_PER_NODE" "JOB_GPUS_PER_TASK=${SLURM_GPUS_PER_TASK:-}" "JOB_LOGS=$logs" \
    python tools/slurm/health.py "$@"
}

pass_on() { # SLURM's warning, to this script alone, reaches the program, once: a second would end it as it saves
  stop=1
  [ -z "$program" ] || [ -n "$passed" ] || kill -USR1 "$program" 2> /dev/null
  passed=$program
}

finish() { # wait for the program, then end the job
  program=$!
  [ -z "$stop" ] || pass_on
  while wait "$program"; kill -0 "$program" 2> /dev/null; do :; done # a signal ends the waiting, not the program
  wait "$program"
  local code=$? first asked=
  if [ "$code" != 0 ] && read -r first asked 2> /dev/null < "$ended"; then
    if [ "$code" = 137 ] && [ "$first" != 3 ] && [ -n "$asked" ]; then
      asked= # by srun, of the others: one was killed without a word
    else
      code=$first
    fi
  elif [ "$code" = 143 ]; then
    asked=asked # before there was a word to be left
  fi
  case " $final " in *" $code "*) exit "$code" ;; esac
  case $code in
    126 | 127) give_up "$code" "code $code: there is no such program, or it cannot be run: not requeued" ;;
    *) end "$code" "$asked" ;;
  esac
}

# What has ended with this code, but not for good, and maybe because it was asked to, goes back into the queue, unless
# that is of no use: the first line that holds decides.
end() {
  local code=$1 asked=${2:-} what="code $1" again="submitted again it goes on" state preempted= now
  case $code in
    130 | 138 | 143) what="ended by a signal before it could save" ;; # SIGINT, SIGUSR1, SIGTERM
    *) [ "$code" = 3 ] || asked= ;;
  esac
  state=$(state_of_job) || give_up "$code" "$what, and SLURM's controller does not answer: not requeued; $again"
  [[ $state == *JobState=RUNNING* ]] || exit "$code" # cancelled, preempted, a lost node: SLURM has decided
  [[ $state == *PreemptTime=[0-9]* ]] && preempted=1 stop=1
  now=$(progress)

  [ -n "$stop" ] || [ -z "$asked" ] || give_up 3 "stopped by a signal that was not SLURM's: not requeued; $again"
  [ -n "$stop" ] || [ "$code" != 3 ] || give_up 3 "stopped as its flags say: not requeued; $again"
  [ "$code $now" != "3 $start" ] || give_up 3 "nothing was saved (checkpoint.save_interval null): not requeued"
  [[ $state != *" Requeue=0"* ]] || give_up "$code" "$what; may not be requeued (sbatch --requeue, JobRequeue); $again"
  if [ -z "$preempted" ] && [ "$now" = "$from" ]; then # this start has not got on
    echo "$from" >> "$stuck" || give_up "$code" "$what, and that cannot be noted in $stuck: not requeued"
    [ "$(grep -cxF -- "$now" "$stuck")" -lt "$tries" ] ||
      give_up "$code" "$what, and $tries starts have not got beyond $now: not requeued"
  fi
  say "$what: requeued, goes on from $now"
  scontrol requeue "$job" || [ $? -gt 128 ] || give_up "$code" "SLURM has not requeued it; $again" # > 128: it has
  exit "$code"
}

state_of_job() { # the controller may be away for a moment
  local _
  for _ in 1 2 3 4 5 6; do
    scontrol --oneliner show job "$job" && return
    sleep 10
  done
  return 1
}

progress() { # how far the program has come: the newest checkpoint, or so many lines of results
  local file
  if file=$(flag json); then
    echo "line $(cat "$file" 2> /dev/null | wc -l) of $file"
  else
    tail -n 1 "$VITRUVIUS_CHECKPOINTS" 2> /dev/null | grep . || echo "$start"
  fi
}

line_of() { # the line of a list that has this number
  grep -vE '^[[:space:]]*(#|$)' "$1" | sed -n "$2{p;q}" | grep .
}

words_of() { # a line's words, as a shell has them, one a line; and a last one, so that an empty one before it is kept
  python3 -c 'import shlex, sys
try:
    print(*shlex.split(sys.argv[1]), "", sep="\n", end="end\n")
except ValueError as error:
    sys.exit(f"job: {error}: {sys.argv[1]}")' "$1"
}

flag() { # the value of --NAME in the command
  local i
  for ((i = ${#run[@]} - 1; i >= 0; i--)); do
    case ${run[i]} in
      "--$1") echo "${run[i + 1]}"; return ;;
      "--$1="*) echo "${run[i]#*=}"; return ;;
    esac
  done
  return 1
}
