"""Make clips and measure them: video files, PSNR, SSIM, LPIPS."""
