"""What ``nemotron3 doctor --gpu`` tries: kernels against float64 references, speeds against data sheets."""
