# What the batch scripts of this folder have in common; they source it, and `run=(...)`, what the user has edited, is set.
# docs/slurm.md tells what it does at which end of a job.
#
#   on_all_ranks COMMAND...  one task per device by srun; rank 0's lines and everybody's errors to the job's log
#   alone COMMAND...         one process beside this script, which starts tasks itself
#
# Either ends the job: with the program's exit code, or by giving it back to SLURM's queue, to go on later.

set +e
tries=3 # starts in a row that do not get on, after which a job is not requeued
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # one task of an array has the number of them all
job=${job:-$SLURM_JOB_ID}
logs=logs/$job # of each rank
ended=$logs/ended-${SLURM_RESTART_COUNT:-0}
program= # number of the process that is waited for
start="the start" # of the run, where nothing is saved yet
final="0 2 4" # exit codes after which another try would end alike: done, wrong, diverged
stop= # whether a stop has been asked for
export PYTHONUNBUFFERED=1
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # SLURM from 22.05 does not

say() { echo "$(date '+[%H:%M:%S]') job: $*"; }

# What one rank does: the program, with its lines kept in a file of its own. Signals of SLURM go to all processes of a
# task: only the program heeds them. The first rank that fails says how; srun has a code of its own where it ends others.
rank='
log=$1/rank-$SLURM_PROCID.log ended=$2
shift 2
trap : TERM USR1 INT
keep() { trap "" TERM USR1 INT; exec tee -a "$log"; }
if [ "$SLURM_PROCID" = 0 ]; then "$@" 2>&1 | keep; else "$@" 2>&1 >> "$log" | keep; fi
code=${PIPESTATUS[0]}
[ "$code" = 0 ] || (set -C; echo "$code" > "$ended") 2> /dev/null
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

begin() { # note where the program goes on from, and look at the nodes
  run=("$@")
  mkdir -p "$logs" || exit 2
  trap pass_on USR1
  trap : TERM # the tasks have it from SLURM, too
  say "start ${SLURM_RESTART_COUNT:-0} of job $job on $SLURM_JOB_NODELIST, $SLURM_NTASKS task(s)," \
    "${SLURM_CPUS_ON_NODE:-?} CPU(s) on the first node, logs of ranks in $logs"
  progress >> "$logs/starts"
  srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 "${container[@]}" \
    env "JOB_TASKS_PER_NODE=$SLURM_TASKS_PER_NODE" python tools/slurm/health.py "${run[@]}"
  local code=$?
  [ "$code" != 2 ] || give_up 2 "a node is not fit for this job"
  [ "$code" = 0 ] && [ -z "$stop" ] || end "$code" # stopped before it has begun
}

pass_on() { # SLURM's warning, to this script alone, reaches the program once
  stop=1
  [ -z "$program" ] || kill -USR1 "$program" 2> /dev/null
}

finish() { # wait for the program, then end the job
  program=$!
  [ -z "$stop" ] || pass_on
  while wait "$program"; kill -0 "$program" 2> /dev/null; do :; done # a signal ends the waiting, not the program
  wait "$program"
  local code=$?
  [ "$code" = 0 ] || code=$(cat "$ended" 2> /dev/null || echo "$code")
  case " $final " in
    *" $code "*) exit "$code" ;;
    *) end "$code" ;;
  esac
}

end() { # what has ended with this code, but not for good: back into the queue, unless that is of no use
  local code=$1 state preempted= now count _
  for _ in 1 2 3 4 5 6; do # a controller may be away for a moment
    state=$(scontrol --oneliner show job "$job") && break
    sleep 10
  done
  [[ $state == *JobState=RUNNING* ]] || exit "$code" # cancelled, preempted, a lost node: SLURM has decided
  [[ $state == *PreemptTime=[0-9]* ]] && preempted=1 stop=1
  if [ "$code" = 3 ] && [ -z "$stop" ]; then
    give_up 3 "stopped as its flags say; submitted again it goes on"
  fi
  now=$(progress)
  [ "$code $now" != "3 $start" ] || give_up 3 "nothing was saved (checkpoint.save_interval null): not requeued"
  count=$(tail -n "$tries" "$logs/starts" | grep -cxF -- "$now")
  if [ -z "$preempted" ] && [ "$count" = "$tries" ]; then
    give_up "$code" "code $code, and $tries starts in a row have not got beyond $now: not requeued"
  fi
  say "code $code: requeued, goes on from $now"
  scontrol requeue "$job" || [ $? -gt 128 ] || give_up "$code" "cannot be requeued (sbatch --requeue, JobRequeue)" # > 128: it is
  exit "$code"
}

give_up() {
  say "$2"
  exit "$1"
}

progress() { # how far the program has come: the checkpoint that rank 0 has told of last, or so many lines of results
  local file newest
  if file=$(flag json); then
    echo "line $(cat "$file" 2> /dev/null | wc -l) of $file"
  else
    newest=$(grep -aoE '^ ?(saved|resume: from) .*/step-[0-9]+' "$logs/rank-0.log" 2> /dev/null | tail -n 1)
    newest=${newest#*saved }
    echo "${newest:+${newest#*from }}" | grep . || echo "$start"
  fi
}

line_of() { # the line of a list that has this number
  grep -vE '^[[:space:]]*(#|$)' "$1" | sed -n "$2{p;q}" | grep .
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
