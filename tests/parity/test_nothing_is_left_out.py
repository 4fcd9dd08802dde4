"""Every number that was recorded of the diffusion core is compared by a test, or is named here with the reason."""

import re
from functools import cache
from pathlib import Path

import pytest
from safetensors import safe_open

TESTS = Path(__file__).parents[1]
LEVELS = r"out\.(karras|exponential)\."
# file -> {keys (a whole match): the test that compares them, or why none does}
LEDGER = {
    "data/parity/iddpm_core/io.safetensors": {
        r"out\.betas\..*": "parity/test_iddpm_processes.py test_betas",
        r"out\.sched\..*": "parity/test_iddpm_processes.py test_tables_and_posteriors",
        r"out\.space\..*": "parity/test_iddpm_processes.py test_which_steps_are_kept",
        r"out\.model_t\..*": "parity/test_iddpm_processes.py test_what_the_network_is_told",
        r"out\.(q_sample|q_posterior)\..*": "parity/test_iddpm_processes.py test_forward_process_and_its_posterior",
        r"out\.pmv\..*": "parity/test_iddpm_processes.py test_distribution_of_the_next_step",
        r"out\.loss\..*\.(loss|grad)": "parity/test_iddpm_losses.py test_losses_and_gradients",
        r"out\.loss\..*\.(mse|vb)": "parity/test_iddpm_losses.py test_terms",
        r"out\.bpd\..*": "parity/test_iddpm_likelihood.py test_bits_per_dimension",
        r"out\.prior_bpd\..*": "parity/test_iddpm_likelihood.py test_prior",
        r"out\.sample\.p\..*": "parity/test_iddpm_samplers.py test_ancestral_sampling",
        r"out\.sample\.ddim\..*": "parity/test_iddpm_samplers.py test_ddim",
        r"out\.sample\.ddim_reverse\..*": "parity/test_iddpm_samplers.py test_inversion",
        r"out\.resample\..*": "test_densities.py test_second_moment_is_that_of_guided_diffusion",
    },
    "data/parity/k_samplers/io.safetensors": {
        rf"{LEVELS}(?!dpm_adaptive|dpm_fast).*": "parity/test_k_samplers.py test_on_the_exact_mixture",
        r"out\.sigmas\..*": "parity/test_k_times.py test_levels",
        r"out\.compvis\.q[01]\.(sd|karras)\..*": "parity/test_k_samplers.py test_on_a_network",
        r"out\.compvis\.q[01]\.(get_sigmas\..*|sigmas10\.sd)": "parity/test_k_times.py test_levels_of_the_training_steps",
        r"out\.compvis\.q[01]\.(sigmas10\.karras|sigma_min_max)": "parity/test_k_times.py test_karras_levels_of_the_training_range",
        r"out\.compvis(_v)?\.q[01]\.(denoised|loss)": "parity/test_k_wrappers.py test_wrappers_of_stable_diffusion",
        r"out\.(compvis\.q0|vdenoiser)\.sigma_to_t": "parity/test_k_wrappers.py test_times_of_a_sigma",
        r"out\.vdenoiser\.(denoised|t_to_sigma)": "parity/test_k_wrappers.py test_wrapper_of_v",
        r"out\.dpm_fast\..*": "parity/test_k_samplers.py test_fast",
        r"out\.dpm_adaptive\..*": "parity/test_k_samplers.py test_adaptive",
        r"out\.ancestral_step": "parity/test_k_samplers.py test_ancestral_steps",
        r"out\.log_likelihood\.(tight|latent)": "parity/test_k_likelihood.py test_with_one_probe",
        r"out\.log_likelihood\.(prior_gap|exact_at_sigma_min)": "parity/test_k_likelihood.py test_exactly",
        r"out\.log_likelihood\.default(\.fevals)?": "parity/test_k_likelihood.py test_by_their_defaults",
    },
    "data/schedules.safetensors": {
        r"out\.\w+_\d+_[\d.]+_[\d.]+\.betas_f64": "parity/test_schedules.py test_betas_in_double_precision",
        r"out\.\w+_\d+_[\d.]+_[\d.]+\.(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_\w+|log_one_minus_\w+)":
            "parity/test_schedules.py test_buffers",
        r"out\.\w+_\d+_[\d.]+_[\d.]+\.posterior_(variance|log_variance_clipped|mean_coef[12])":
            "parity/test_schedules.py test_posterior",
        r"out\.\w+_\d+_[\d.]+_[\d.]+\.posterior_variance_v0\.3": "parity/test_schedules.py test_posterior_of_a_share",
        r"out\.\w+_\d+_[\d.]+_[\d.]+\.lvlb_weights(_x0)?": "parity/test_schedules.py test_weights_of_the_bound",
        r"out\.(q_sample|q_mean|q_variance|q_log_variance)": "parity/test_schedules.py test_forward_process",
        r"out\.predict_start_from_noise": "parity/test_schedules.py test_data_from_noise",
        r"out\.q_posterior_.*": "parity/test_schedules.py test_posterior_of_pictures",
        r"out\.ddim\.(uniform|quad)\.(?!999)\d+\.(timesteps|alphas|alphas_prev)": "parity/test_schedules.py test_ddim_lists",
        r"out\.ddim\..*\.sigmas": "parity/test_schedules.py test_ddim_sigmas",
        r"out\.ddim\.uniform\.999\.timesteps": "parity/test_schedules.py test_a_list_that_reaches_1000_is_refused",
        r"out\.timestep_embedding\.\d+": "parity/test_schedules.py test_timestep_embedding",
        r"out\.timestep_embedding_ddpm_model\.\d+": "no: sines first, as in CompVis' autoencoder file, whose networks are told no time",
    },
    "data/training_traces.safetensors": {
        r"out\.(warm|warm_decay0\.3|fixed0\.9)\.\d\..*": "parity/test_training_traces.py test_average_of_weights",
        r"out\.lr\..*": "parity/test_training_traces.py test_learning_rates",
        r"out\.adamw\..*": "parity/test_training_traces.py test_adamw_under_a_schedule",
    },
    "data/parity/diffusers_schedulers/io.safetensors": {
        r"out\..*\.n\d+\.sigmas": "parity/test_diffusers_schedulers.py test_noise_levels",
        r"out\.(?!PNDM\.linspace).*\.n\d+\.(traj|model_output)": "parity/test_diffusers_schedulers.py test_trajectories",
        r"out\.PNDM\.linspace\..*\.(traj|model_output)": "parity/test_diffusers_schedulers.py test_multistep_slopes_of_linspace",
        r"out\..*\.n\d+\.timesteps": "parity/test_diffusers_schedulers.py test_what_the_network_is_told",
        r"out\..*\.n\d+\.init_noise_sigma": "parity/test_diffusers_schedulers.py test_trajectories",  # traj[0]
        r"out\..*\.n\d+\.n_noise": "no: how many noises theirs draws, some of them unused",
        r"out\.min_snr\..*": "parity/test_diffusers_schedulers.py test_min_snr_weights",
        r"out\.(snr|table)\..*": "parity/test_diffusers_schedulers.py test_tables",
        r"out\.(add_noise|get_velocity)\..*": "parity/test_diffusers_schedulers.py test_noising_and_velocity",
    },
}  # fmt: skip


@cache
def keys(file: str) -> list[str]:
    with safe_open(TESTS / file, "pt") as tensors:
        return [key for key in tensors.keys() if key.startswith("out.")]  # noqa: SIM118  (a reader, not a dict)


@pytest.mark.parametrize("file", LEDGER)
def test_every_key_has_its_line(file):
    lines = LEDGER[file]
    for key in keys(file):
        found = [pattern for pattern in lines if re.fullmatch(pattern, key)]
        assert len(found) == 1, (key, found)
    for pattern, where in lines.items():
        assert any(re.fullmatch(pattern, key) for key in keys(file)), pattern
        if not where.startswith("no: "):
            module, test = where.split()
            assert f"def {test}(" in (TESTS / module).read_text(), where
