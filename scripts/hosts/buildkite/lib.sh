# shellcheck shell=bash
# What the hooks of the plugin and those of the agent share. Nothing in here fails a job that is not strict.
#
# The agent sources a hook and then compares the environment: a hook that calls `exit` loses what it exported, so these end by
# returning, and only a failure exits.

forkvol_note() {
  printf 'forkvol: %s\n' "$*" >&2
}

forkvol_is_there() {
  command -v forkvol >/dev/null || {
    forkvol_note "the program forkvol is not on this agent's PATH: the job goes without its cache"
    return 1
  }
}

# Ends what jobs left behind whose agent or boot is gone. Before the checkout too: a mount in it is in the way of `git clean`.
forkvol_stale() {
  forkvol finish --stale --deadline 20s || forkvol_note "jobs of agents that are gone were not all ended"
}

# The process that runs this job, without which it is over. An agent may run several jobs side by side, each in a process of its
# own below it, so the agent's own number alone does not say that a job has ended.
forkvol_job_process() {
  local pid=$PPID name stat
  while ((pid > 1)) && read -r name <"/proc/$pid/comm" && read -r stat <"/proc/$pid/stat"; do
    if [[ $name == buildkite-agent ]]; then
      echo "$pid"
      return
    fi
    # The name, in brackets, may hold anything; behind it come the state and the parent.
    read -r _ pid _ <<<"${stat##*) }"
  done
}

# Attaches and exports the job's variables: forkvol_attach JOB ARGUMENT...
forkvol_attach() {
  local job=$1 pid variables
  shift
  pid=$(forkvol_job_process)
  variables=$(forkvol attach --job "$job" ${pid:+--agent-pid "$pid"} "$@") || return
  set -a
  eval "$variables"
  set +a
}

# Statuses of the command that are no failure, beside 0.
forkvol_success=()

# How the job ended, as far as it can be told in pre-exit. The command's status is not set where the command never ran; it stays 0
# where a hook behind the command failed.
forkvol_outcome() {
  local status=${BUILDKITE_COMMAND_EXIT_STATUS:-none} other
  for other in "${forkvol_success[@]}"; do
    [[ $status != "$other" ]] || status=0
  done
  if [[ ${BUILDKITE_JOB_CANCELLED:-} == true ]]; then
    echo cancelled
  elif [[ $status == 0 && ${BUILDKITE_LAST_HOOK_EXIT_STATUS:-0} == 0 ]]; then
    echo success
  else
    echo failure
  fi
}

# Ends a job: forkvol_finish JOB [--strict]. A status other than 0 would take the place of the job's own, so only a job that did
# well is made to fail.
forkvol_finish() {
  local job=$1 outcome deadline=10m
  shift
  outcome=$(forkvol_outcome)
  # What is cancelled has the agent's grace period to end in, ten seconds by default.
  [[ $outcome != cancelled ]] || deadline=5s
  forkvol finish --job "$job" --outcome "$outcome" --deadline "$deadline" "$@" || [[ $outcome != success ]]
}

# The plugin

# Reads the plugin's options into these, one element for each set of volumes that share their options: all -v and -p, and what else
# attach is to be told. Words are quoted for eval.
forkvol_wishes=()
forkvol_options=()
# All paths, for a job that goes without its cache.
forkvol_paths=()

# The values of a list, or of a single value: forkvol_values VARIABLE
forkvol_values() {
  local name=$1 at=0 item
  if [[ -n ${!name:-} ]]; then
    printf '%s\0' "${!name}"
    return
  fi
  item=${name}_$at
  while [[ -n ${!item:-} ]]; do
    printf '%s\0' "${!item}"
    at=$((at + 1))
    item=${name}_$at
  done
}

# The label that stands for what these files hold.
forkvol_manifest() {
  local sums
  if sums=$(sha256sum -- "$@"); then
    read -r sums _ < <(sha256sum <<<"$sums")
    echo "--label manifest=$sums"
  else
    forkvol_note "the manifest cannot be read: the hit does not depend on it"
  fi
}

# One volume's options as quoted words: forkvol_volume_options PREFIX
forkvol_volume_options() {
  local prefix=$1 key option name value files
  mapfile -d '' files < <(forkvol_values "${prefix}_MANIFEST")
  # shellcheck disable=SC2016  # read when it is attached
  [[ ${#files[@]} -eq 0 ]] || printf '%s' '$(forkvol_manifest' "$(printf ' %q' "${files[@]}")" ') '
  for key in SIZE:--size OWNER:--owner FROM:--from PARENTS:--parent LABELS:--label LABEL_FILES:--label-file EXCLUDE:--exclude; do
    option=${key#*:}
    while IFS= read -r -d '' value; do
      printf '%q %q ' "$option" "$value"
    done < <(forkvol_values "${prefix}_${key%%:*}")
  done
  for key in READ_ONLY:--read-only EPHEMERAL:--ephemeral ACL:--acl NO_DEFAULT_EXCLUDE:--no-default-exclude; do
    name=${prefix}_${key%%:*}
    [[ ${!name:-} != true ]] || printf '%s ' "${key#*:}"
  done
}

forkvol_read_plugin() {
  local prefix=BUILDKITE_PLUGIN_${BUILDKITE_PLUGIN_NAME:-FORKVOL} at=0 common='' when='' key name value volume options wish group
  name=${prefix}_COMMIT
  [[ -z ${!name:-} ]] || when=$(printf -- '--commit %q ' "${!name}")
  for key in LINK:--link EXISTING:--existing MOUNT_ROOT:--mount-root DEADLINE:--deadline; do
    name=${prefix}_${key%%:*}
    [[ -z ${!name:-} ]] || common+=$(printf '%q %q ' "${key#*:}" "${!name}")
  done
  mapfile -d '' forkvol_success < <(forkvol_values "${prefix}_SUCCESS")
  forkvol_strict=()
  name=${prefix}_STRICT
  if [[ ${!name:-} == true ]]; then
    forkvol_strict=(--strict)
    common+='--strict '
  fi
  while volume=${prefix}_VOLUMES_$at && [[ -n $(compgen -v "${volume}_") ]]; do
    at=$((at + 1))
    name=${volume}_NAME
    if [[ -z ${!name:-} ]]; then
      forkvol_note "volume number $at of the plugin's options has no name"
      return 1
    fi
    wish=$(printf -- '-v %q ' "${!name}")
    while IFS= read -r -d '' value; do
      wish+=$(printf -- '-p %q ' "$value")
      forkvol_paths+=("${value/#\~\//$HOME/}")
    done < <(forkvol_values "${volume}_PATHS")
    options=$common$(forkvol_volume_options "$volume")
    # Of what is only read or thrown away there is no commit.
    [[ " $options" =~ ' --read-only '|' --ephemeral ' ]] || options+=$when
    for group in "${!forkvol_options[@]}"; do
      if [[ ${forkvol_options[group]} == "$options" ]]; then
        forkvol_wishes[group]+=$wish
        continue 2
      fi
    done
    forkvol_wishes+=("$wish")
    forkvol_options+=("$options")
  done
}

# The name of the job that has all sets. The plugin may be listed more than once in a step; its configuration tells one from the other.
forkvol_plugin_job() {
  local sum
  read -r sum _ < <(printf %s "${BUILDKITE_PLUGIN_CONFIGURATION:-}" | cksum)
  echo "${BUILDKITE_JOB_ID:?}.plugin.$sum"
}

# shellcheck disable=SC2120  # its arguments are its own
forkvol_plugin_start() {
  local group failed=0
  if forkvol_read_plugin && forkvol_is_there; then
    forkvol_stale
    for group in "${!forkvol_wishes[@]}"; do
      eval "set -- ${forkvol_wishes[group]} ${forkvol_options[group]}"
      forkvol_attach "$(forkvol_plugin_job)" --add "$@" || failed=1
    done
  else
    failed=1
  fi
  ((failed)) || return 0
  [[ ${#forkvol_strict[@]} -eq 0 ]] || return 1
  # Empty folders, as for every job that goes without its cache.
  [[ ${#forkvol_paths[@]} -eq 0 ]] || mkdir -p -- "${forkvol_paths[@]}" || forkvol_note "its folders are missing"
}

forkvol_plugin_end() {
  forkvol_read_plugin && command -v forkvol >/dev/null || return 0
  forkvol_finish "$(forkvol_plugin_job)" "${forkvol_strict[@]}"
}

# The agent's own hooks

# What the owner's list says of this pipeline, into `forkvol_arguments`: forkvol_listed FILE...
forkvol_listed() {
  local file words pipeline=${BUILDKITE_ORGANIZATION_SLUG:-}/${BUILDKITE_PIPELINE_SLUG:-}
  local step=$pipeline/${BUILDKITE_STEP_KEY:-}
  for file; do
    [[ -r $file ]] || continue
    while read -r -a words; do
      [[ ${#words[@]} -gt 0 && ${words[0]} != \#* ]] || continue
      # shellcheck disable=SC2053  # the first word is a pattern
      if [[ $pipeline == ${words[0]} || $step == ${words[0]} ]]; then
        forkvol_arguments=("${words[@]:1}")
        return 0
      fi
    done <"$file"
    return 1
  done
  return 1
}

# What is to be attached, into `forkvol_arguments`: what the owner says, beside lib.sh or under /etc, else what the repository asks
# for. No variable names the list, for a pipeline may set variables.
forkvol_agent_arguments() {
  forkvol_arguments=()
  if forkvol_listed "$(dirname -- "${BASH_SOURCE[0]}")/pipelines" /etc/forkvol/pipelines; then
    [[ ${forkvol_arguments[*]} != none ]] || forkvol_arguments=()
  elif [[ -f .forkvol.yml ]]; then
    forkvol_arguments=(--config .forkvol.yml)
  fi
}

forkvol_agent_is_strict() {
  local word
  for word in "${forkvol_arguments[@]}"; do
    [[ $word != --strict ]] || return 0
  done
  return 1
}

forkvol_agent_start() {
  forkvol_agent_arguments
  [[ ${#forkvol_arguments[@]} -gt 0 ]] || return 0
  if forkvol_is_there; then
    forkvol_stale
    ! forkvol_attach "${BUILDKITE_JOB_ID:?}" "${forkvol_arguments[@]}" || return 0
  fi
  ! forkvol_agent_is_strict
}

forkvol_agent_end() {
  local job strict=() failed=0
  command -v forkvol >/dev/null || return 0
  forkvol_agent_arguments
  ! forkvol_agent_is_strict || strict=(--strict)
  forkvol_finish "${BUILDKITE_JOB_ID:?}" "${strict[@]}" || failed=1
  # What cache_forkvol has put in place; what was to be kept of it, it has committed.
  while read -r job _; do
    [[ $job != "$BUILDKITE_JOB_ID".cache.* ]] || forkvol finish --job "$job" --outcome unknown || forkvol_note "$job is still attached"
  done < <(forkvol jobs)
  return "$failed"
}
